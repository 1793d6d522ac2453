"""The distribution's version, here so that a checkout knows it without being installed."""

VERSION = "0.2.0"
