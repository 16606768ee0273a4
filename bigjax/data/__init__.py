"""What a model learns from: `sources` find it, `pipeline` makes batches, `augment` varies images on the device."""
