"""Train a small DETR: `accelerate launch train/detector.py --config FILE key=value`."""

from featinv_diffusion.training.detector import DetectorConfig, train_detector
from featinv_diffusion.training.entry import run_script

if __name__ == "__main__":
    run_script(DetectorConfig, train_detector, __doc__)
