"""Polar factors and the other heavy steps, one plain reference each."""
