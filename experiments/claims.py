"""The paper's claims, each with its numbers and a verdict, from the committed results of experiments."""

CLAIMS = {}
