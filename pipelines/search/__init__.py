"""Search over a pipeline's samples by reward, for every pipeline that can be searched."""
