"""`python -m featinv_diffusion`: as `featinv`, e.g. under `accelerate launch -m`."""

from featinv_diffusion.cli import main

if __name__ == "__main__":
    main()
