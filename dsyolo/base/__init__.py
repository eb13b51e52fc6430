"""The ground floor: errors, the environment, safe reading of files, and the types that cross borders."""
