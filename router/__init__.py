"""llama-router: one OpenAI-compatible endpoint in front of any number of models on one machine."""


def __getattr__(name: str) -> str:
    """`__version__`, looked up only when asked for: every engine of the embedded kind imports this package."""
    if name != "__version__":
        raise AttributeError(name)
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("llama-router")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "0+unknown"
