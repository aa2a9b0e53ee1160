/* Reads a file through sharearea and says what it is: a sum of its bytes, and how much of it is shared. Then it waits for a
 * line on its standard input and says it again, until that ends. docs/programs.md has the command that builds it. */
#include <sharearea.h>

#include <stdint.h>
#include <stdio.h>
#include <string.h>

int main(int argc, char **argv)
{
	sharearea_file *file;
	char line[16];
	int error;

	if (argc != 2) {
		fprintf(stderr, "usage: reader FILE\n");
		return 2;
	}
	error = sharearea_open(argv[1], &file);
	if (error) {
		fprintf(stderr, "reader: %s: %s\n", argv[1], strerror(-error));
		return 1;
	}
	do {
		const uint8_t *bytes = sharearea_address(file);
		uint64_t sum = 0;

		for (size_t i = 0; i < sharearea_length(file); i++)
			sum += bytes[i];
		printf("%zu bytes, sum %llu, %zu shared\n", sharearea_length(file), (unsigned long long)sum,
		       sharearea_shared(file));
		fflush(stdout);
	} while (fgets(line, sizeof line, stdin));
	sharearea_close(file);
	return 0;
}
