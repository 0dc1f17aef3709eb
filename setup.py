"""Package list: `pipelines/`, `examples/` and `assets/` stand beside `attnctrl/` and are installed inside it."""

from setuptools import find_packages, setup

# with the third model the wheel would be 36 MB; toy-sd3 comes by `pip install ./assets`
MODELS = ("toy-flux", "toy-sd")
GUESTS = {"attnctrl.pipelines": "pipelines", "attnctrl.examples": "examples", "attnctrl.assets": "assets"}

setup(
    packages=[*find_packages(include=["attnctrl", "attnctrl.*"]), *GUESTS],
    package_dir=GUESTS,
    include_package_data=False,
    package_data={
        "attnctrl": ["py.typed"],
        "attnctrl.examples": ["*.yaml", "masks/*.png", "references/*.png"],
        "attnctrl.assets": [f"{model}/**" for model in MODELS],  # pictures for the docs stay in the repository
    },
)
