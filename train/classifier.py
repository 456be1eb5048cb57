"""Train a small timm classifier: `accelerate launch train/classifier.py --config FILE`."""

from featinv_diffusion.training.classifier import ClassifierConfig, train_classifier
from featinv_diffusion.training.entry import run_script

if __name__ == "__main__":
    run_script(ClassifierConfig, train_classifier, __doc__)
