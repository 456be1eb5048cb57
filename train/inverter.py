"""Train modular inverters: `accelerate launch train/inverter.py --config FILE key=value`."""

from featinv_diffusion.training.entry import run_script
from featinv_diffusion.training.inverter import InverterConfig, train_inverter

if __name__ == "__main__":
    run_script(InverterConfig, train_inverter, __doc__)
