"""Image sets by name: each module reads one family into arrays, split by split.

`digits` is embedded; `idx` (MNIST, Fashion-MNIST) and `cifar10` read local original files;
`catalogue` reads any other prepared TensorFlow Datasets set. `prepared` writes and caches them."""
