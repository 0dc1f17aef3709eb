"""The embedded models; installed as `attnctrl.assets`, and those that its wheel leaves out as `attnctrl_models`."""
