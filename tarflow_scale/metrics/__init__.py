"""Images and likelihoods to numbers that carry their protocol; the only user of torch-fidelity."""
