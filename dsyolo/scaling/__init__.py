"""`dsyolo scale`: run a training at each size, and report how it scales on these machines."""
