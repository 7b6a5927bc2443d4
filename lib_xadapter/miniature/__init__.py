"""A pair of worlds small enough to be learned from nothing, and the models, plugins and mapping layers of them."""
