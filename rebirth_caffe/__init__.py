"""DeepRebirth for Caffe: rewrites trained Caffe networks into faster ones."""
