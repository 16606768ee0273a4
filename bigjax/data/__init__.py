"""What a model learns from: `sources` finds and checks it, `pipeline` makes batches of it, `augment` varies images on the device."""
