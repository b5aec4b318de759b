"""What modules are called. Nothing here knows a model's tensors; each question has a module:

- names: which prefix is which network, and where the dots of a flat name were
- unet: what the blocks of Stable Diffusion's U-Nets are called by LDM and by diffusers
- tables: what a family of DiTs calls its weights; a new family's names are one more `families.Family` in here
- families: how a line of a table is read, and which rows of a fused weight a part is
- recognise: which families a model's or a file's names fit
- spelling, respell: one module under other names; layers cut or joined where the names mean other weights
- parts: how a layer is cut into layers of rows, and joined
- readers: which other programs find a file's names
- layouts: the blocks of a model, their labels, and the vectors in circulation
- patterns: regular expressions from files and users, and whether one is quick to match
"""
