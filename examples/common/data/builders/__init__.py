"""Builders of data sets that tensorflow-datasets lacks; importing them makes their names known."""

from examples.common.data.builders.caltech256 import caltech256_dataset_builder as caltech256
from examples.common.data.builders.indoor67 import indoor67_dataset_builder as indoor67

__all__ = ["caltech256", "indoor67"]
