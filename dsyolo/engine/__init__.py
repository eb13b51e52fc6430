"""DeepSpeed's border: the only folder that imports deepspeed."""
