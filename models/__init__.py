if __name__ != "svg_jax.models":
    raise ImportError(f"import svg_jax.models, not {__name__}: install the project with `pip install -e .`")
