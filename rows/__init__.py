"""The row contract: what a row of image-text data holds, how it is read, checked and written. It imports no other
package of this project, and not transformers."""
