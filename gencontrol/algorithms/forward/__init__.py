"""Methods on the forward process: CRD, DiffusionNFT and advantage-weighted matching."""
