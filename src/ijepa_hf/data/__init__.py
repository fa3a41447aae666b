"""Images and labels: opens data sets, decodes, crops, orders, masks and loads them."""
