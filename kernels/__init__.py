if __name__ != "svg_jax.kernels":
    raise ImportError(f"import svg_jax.kernels, not {__name__}: install the project with `pip install -e .`")
