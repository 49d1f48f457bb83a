"""`gencontrol bench dragon`: claims of DRAGON on mixtures, songs and sound."""
