"""The harness's command, with Plumb's backend known to it."""

from lm_eval.__main__ import cli_evaluate

from . import PlumbLM

__all__ = ["PlumbLM"]

if __name__ == "__main__":
    cli_evaluate()
