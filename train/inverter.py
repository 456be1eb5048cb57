"""`featinv train inverter` in a checkout: `accelerate launch train/inverter.py --config …`."""

from featinv_diffusion.cli.train import inverter, run_script

if __name__ == "__main__":
    run_script(inverter)
