"""The built-in pictures: scenes of emoji with captions, questions and answers."""
