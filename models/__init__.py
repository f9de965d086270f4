"""Builders of models that the configuration names as ``module:function``."""
