"""The embedded models; installed as `attnctrl.assets`."""
