"""What a training run will hold, send and take, told before anything is launched."""
