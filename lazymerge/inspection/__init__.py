"""What a person wants to know of a plan, a checkpoint or an output: computed here, worded in cli/,
drawn in page/. Nothing is decided here that a run depends on."""
