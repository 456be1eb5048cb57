"""The web page and the widgets of a notebook: pictures that follow a slider or a brush."""
