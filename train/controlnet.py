"""`featinv train controlnet` in a checkout: `accelerate launch train/controlnet.py --config …`."""

from featinv_diffusion.cli.train import controlnet, run_script

if __name__ == "__main__":
    run_script(controlnet)
