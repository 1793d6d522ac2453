"""Labelled images, and thresholds that keep a promise about others like them."""
