if __name__ != "svg_jax.convert":
    raise ImportError(f"import svg_jax.convert, not {__name__}: install the project with `pip install -e .`")
