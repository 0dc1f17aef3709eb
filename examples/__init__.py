"""Scenes and scripts to run first; installed as `attnctrl.examples`."""
