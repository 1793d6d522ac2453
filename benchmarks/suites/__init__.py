"""What is asked: HoliSafe-Bench from a local folder, its built-in sibling, the guard's images, question answering."""
