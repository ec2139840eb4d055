/* Every call of the C library's streams that DFTracer records: WRITTEN bytes to one file, and all of them back. */
#define _GNU_SOURCE
#include <stdarg.h>
#include <stdio.h>

static int print(FILE *file, const char *format, ...) {
    va_list words;
    va_start(words, format);
    int printed = vfprintf(file, format, words);
    va_end(words);
    return printed;
}

void write_stream(const char *path) {
    char text[64];
    snprintf(text, sizeof text, "%d is a line\n", 42);
    FILE *file = fopen(path, "w");
    fputs(text, file);
    fputc(text[0], file);
    putc(0, file); /* a byte, though it returns 0 */
    putc_unlocked('\n', file);
    putw(-7, file);
    print(file, "%s and more\n", text);
    fwrite(text, 4, 3, file);
    fclose(file);
    file = fopen(path, "a");
    fwrite(text, 1, 5, file);
    fclose(file);
}

void read_stream(const char *path) {
    char text[64], *line = NULL;
    size_t size = 0;
    FILE *file = fopen(path, "r");
    fgets(text, sizeof text, file);
    fgetc(file);
    getc(file);
    getc_unlocked(file);
    getw(file);
    getline(&line, &size, file);
    getdelim(&line, &size, 'm', file);
    fread(text, 3, 2, file);
    while (fgetc(file) != EOF) {
    }
    fgets(text, sizeof text, file); /* at the end: nothing */
    fclose(file);
}
