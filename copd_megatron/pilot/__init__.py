"""`copd pilot`: what one teacher gives to students at different distances, and what predicts it."""
