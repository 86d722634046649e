"""Certificates for the processes of one run of the matrix, and Dask's settings that name them."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from pathlib import Path

VALID_DAYS = 2


def make_certificates(folder: Path) -> dict[str, str]:
    """An authority and one certificate of it for all; returns the environment that has Dask use
    them, and nothing else."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    def named(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    def begun(subject: str, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        now = datetime.now(timezone.utc)
        return (
            x509.CertificateBuilder()
            .subject_name(named(subject))
            .issuer_name(named("matrix authority"))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=VALID_DAYS))
            .not_valid_after(now + timedelta(days=VALID_DAYS))
        )

    authority, own = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    signed = begun("matrix authority", authority).add_extension(
        x509.BasicConstraints(ca=True, path_length=0), critical=True
    )
    leaf = begun("matrix", own).add_extension(
        x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False
    )
    pem = serialization.Encoding.PEM
    files = {
        "ca.pem": signed.sign(authority, hashes.SHA256()).public_bytes(pem),
        "own.pem": leaf.sign(authority, hashes.SHA256()).public_bytes(pem),
        "own.key": own.private_bytes(
            pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ),
    }
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
        (folder / name).chmod(0o600)
    setting = "DASK_DISTRIBUTED__COMM__TLS__"
    environment = {f"{setting}CA_FILE": str(folder / "ca.pem")}
    for role in ("SCHEDULER", "WORKER", "CLIENT"):
        environment[f"{setting}{role}__CERT"] = str(folder / "own.pem")
        environment[f"{setting}{role}__KEY"] = str(folder / "own.key")
    return environment
