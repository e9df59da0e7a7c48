// The index of the pictures, one row of int8 each, and the search over all of them.

// The bytes of index.bin: N scales (float32), then N rows of `dim` int8; a row times its scale has length 1.
export function readIndex(buffer, rows, dim) {
  const scales = new Float32Array(buffer, 0, rows);
  const codes = new Int8Array(buffer, 4 * rows);
  if (codes.length !== rows * dim) throw new Error("The index is not whole: load the page again.");
  return {
    rows,
    embedding(row) {
      return Float32Array.from(codes.subarray(row * dim, (row + 1) * dim), (code) => code * scales[row]);
    },
    // The rows most similar to an embedding [dim], by the cosine, best first: [{row, score}], at most `count`.
    search(query, count) {
      const length = Math.hypot(...query) || 1; // that of a tower in int8 is only nearly 1
      const scores = new Float32Array(rows);
      for (let row = 0, at = 0; row < rows; row++) {
        let [sum, second, i] = [0, 0, 0]; // two sums at a time: neither waits for the other
        for (; i + 1 < dim; i += 2, at += 2) {
          sum += codes[at] * query[i];
          second += codes[at + 1] * query[i + 1];
        }
        if (i < dim) sum += codes[at++] * query[i];
        scores[row] = ((sum + second) * scales[row]) / length;
      }
      const least = scores.slice().sort()[Math.max(0, rows - count)]; // numbers alone are sorted far faster than rows
      const best = [];
      for (let row = 0; row < rows; row++) if (scores[row] >= least) best.push({ row, score: scores[row] });
      return best.sort((a, b) => b.score - a.score || a.row - b.row).slice(0, count);
    },
  };
}
