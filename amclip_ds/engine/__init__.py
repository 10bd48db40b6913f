"""The engine package: the only package that imports deepspeed."""
