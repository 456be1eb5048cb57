"""`python -m featinv_diffusion`: as `featinv`, e.g. under `accelerate launch -m`."""

from featinv_diffusion.cli import main, process


def run() -> None:
    """Is the process of `featinv`."""
    process.run(main)


if __name__ == "__main__":
    run()
