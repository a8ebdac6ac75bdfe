"""The command ``lightning-hessian``, also as ``python -m lightning_hessian``."""

import sys


def main() -> None:
    """Entry point of the command."""
    try:
        if sys.argv[1:2] == ["report"]:
            from lightning_hessian.cli.report.command import main as report

            return report(sys.argv[2:])
        from lightning_hessian.cli.command import main as run
    except ModuleNotFoundError as error:
        if error.name != "lightning_hessian.cli":
            raise
        print(f"lightning-hessian: {error}", file=sys.stderr)
        sys.exit(2)
    run()


if __name__ == "__main__":
    main()
