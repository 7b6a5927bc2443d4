"""`demo`: the miniature models with and without plugins, side by side, as a grid and on a page in the browser."""
