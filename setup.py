"""The native kernels, built where there is a C compiler. Without one the installation goes on and
lazymerge computes with torch: the same bits, slower."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "lazymerge.engine.native._kernels",
            sources=["lazymerge/engine/native/kernels.c", "lazymerge/engine/native/bus_error.c"],
            depends=[
                "lazymerge/engine/native/checksum.h",
                "lazymerge/engine/native/loops.h",
                "lazymerge/engine/native/ranks.h",
            ],
            extra_compile_args=[
                "-O3",
                "-ffp-contract=off",  # x * y + z rounds twice, as it does in torch
                "-fno-math-errno",
                "-fno-trapping-math",
            ],
            optional=True,
        )
    ]
)
