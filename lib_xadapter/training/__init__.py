"""Training of mapping layers: pictures → batches → what both models are given → steps → an adapter."""
