"""Builds one extension module for every Python from 3.10 on: no processor is assumed, rounding is left alone."""

from setuptools import Extension, setup

# Without -fno-trapping-math gcc keeps branches around arithmetic; no value depends on it.
LOOP = Extension(
    "trainfix_native._loop",
    sources=["loop.c"],
    extra_compile_args=["-std=c11", "-O3", "-ffp-contract=off", "-fno-trapping-math"],
    py_limited_api=True,
)

setup(ext_modules=[LOOP], options={"bdist_wheel": {"py_limited_api": "cp310"}})
