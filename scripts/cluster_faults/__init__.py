"""What scripts/cluster_matrix.py is made of."""
