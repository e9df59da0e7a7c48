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
        let sum = 0;
        for (let i = 0; i < dim; i++, at++) sum += codes[at] * query[i];
        scores[row] = (sum * scales[row]) / length;
      }
      const order = Uint32Array.from({ length: rows }, (_, row) => row);
      order.sort((a, b) => scores[b] - scores[a] || a - b);
      return Array.from(order.subarray(0, count), (row) => ({ row, score: scores[row] }));
    },
  };
}
